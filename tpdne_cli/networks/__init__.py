"""The networks, each a single file that can be read in one sitting."""
