"""Files and folders: written all at once, locked, and never through a link that leads elsewhere."""
