"""Using a trained student: segmenting images, exporting to the formats of other libraries."""
