"""What people look at: pictures of masks over photos, and one static page for each run."""
