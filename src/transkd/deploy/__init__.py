"""Use of a trained student: prediction on images, export to formats of other libraries."""
