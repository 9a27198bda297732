"""What the product does with credits, free of HTTP: api/ and proxy/ call it, and add only their own form."""
