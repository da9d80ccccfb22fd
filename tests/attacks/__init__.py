"""Files that try to run code, to exhaust memory or time, or to write elsewhere; each is made by a few lines.

Every module holds ATTACKS: name -> function of no arguments that returns the file's bytes. No file does anything when
it is read as it should be; those that would run code if unpickled would only create CANARY.
"""

CANARY = "tpdne-attack-canary"
