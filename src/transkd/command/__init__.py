"""What the commands share behind their door, ``cli.py``: errors, signals, folders of runs. Without torch."""
