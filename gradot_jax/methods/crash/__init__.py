"""`crash`, and the similarity of layers that it clusters by."""
