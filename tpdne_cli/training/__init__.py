"""The training room: a folder of photographs in, a generator of one's own out."""
