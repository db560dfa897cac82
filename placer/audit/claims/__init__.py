"""What a document may claim: one class for each kind of claim, which says it in words and holds it to a plan."""
