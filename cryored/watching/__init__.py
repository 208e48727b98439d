"""What the resident updater consists of: hand-over files, table, report."""
