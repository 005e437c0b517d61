"""Which rounding keeps a tune of a base that ships on a grid? The behaviour study on seven such grids."""
