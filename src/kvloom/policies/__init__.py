"""Which tokens to evict: scorer x budget x trigger x action. No model class, no engine."""
