"""Where text comes from: files, folders, rows, named texts; and what it is."""
