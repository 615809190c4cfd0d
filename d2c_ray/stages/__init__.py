"""The stages: one short file each, a function from files to files. No stage imports another."""
