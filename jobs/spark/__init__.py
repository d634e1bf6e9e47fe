"""What Spark needs: Java, the Delta jars, a session."""
