"""Expert maps: which expert is in which slot, and the files of the frameworks that read and write them."""
