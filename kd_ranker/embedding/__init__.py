"""Tables whose update cost follows the rows touched."""
