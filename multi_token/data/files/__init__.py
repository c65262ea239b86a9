"""Storage formats of rows, one file each."""
