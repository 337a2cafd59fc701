"""Where time goes: runs of a bundle measured stage by stage, checked, drawn and compared."""
