"""Texts: their sources (files, folders, rows, named ones), the formats of their files, and what can be counted."""
