"""What the program runs on: devices, folders, files, the terminal."""
