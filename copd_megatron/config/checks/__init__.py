"""Checks that span fields, a file for each subject. Each yields its problems as sentences."""
