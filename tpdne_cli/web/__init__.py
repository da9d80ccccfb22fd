"""The page and its HTTP interface: the room behind `tpdne serve`, which needs the extra `serve`."""
