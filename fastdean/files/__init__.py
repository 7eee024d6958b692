"""What lies on disk: files and folders that appear whole or not at all, and what they hold."""
