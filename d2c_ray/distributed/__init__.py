"""The only package that imports Ray: where work is spread over processes and machines."""
