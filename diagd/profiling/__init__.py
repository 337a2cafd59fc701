"""What a bundle costs and whether it is right: planned, measured stage by stage, verified and compared."""
