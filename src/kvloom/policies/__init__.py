"""What to forget: scorer x budget x trigger x action. No model class, no engine."""
