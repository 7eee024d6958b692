"""What `fastdean estimate` says of models of known shapes, as the tables of the guide."""
