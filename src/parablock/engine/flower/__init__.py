"""The engine of real sites in a Flower federation: Flower starts the processes, and carries one message to each.

run_certificate  the certificate that the server has for one run
invitations      the server's end: it invites nodes, and lets in who comes by an invitation
joining          a site's end: it takes an invitation, and answers when it has no more to do
"""
