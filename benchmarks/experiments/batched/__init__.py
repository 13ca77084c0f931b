"""Many small MLPs trained at once by the package's own ``rho="auto"``: what each of its constants is worth."""
