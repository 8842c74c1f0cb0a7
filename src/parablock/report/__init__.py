"""What people read: progress, tables, pictures, from run-directory data alone."""
