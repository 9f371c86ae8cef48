"""What every part stands on: types and checks, small dense algebra, layouts of trees, devices."""
