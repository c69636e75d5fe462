"""Ray as the run sees it: the connection, where roles are placed, and its errors in our words."""
