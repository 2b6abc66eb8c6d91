"""The sources of text: files, folders, rows and named texts; and the formats of their files."""
