"""What each command does, from files to files. Recipes configure these functions; the command line calls them."""
