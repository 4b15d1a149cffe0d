"""The pages: each is a function from a visit to what its template shows."""
