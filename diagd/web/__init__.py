"""A world in a web page: a folder of files that any host serves."""
