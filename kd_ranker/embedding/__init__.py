"""Tables with an update cost in proportion to the rows touched."""
