"""What several rooms test with: tiny random models, engines around them, servers, oracles and tolerances."""
