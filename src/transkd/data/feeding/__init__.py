"""Feeding the networks faster: decoded frames cached on disk, and augmentation on the device."""
