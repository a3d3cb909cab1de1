"""A small VMM on KVM: flat guest programs, RAM, passed-through BARs, one emulated device.

Owns what `interceptctl guest` runs and shows; the VMM's part of the intercept path is `intercept_client.kvm`.
In reading order: `programs` is what guests do; `emulated` and `small_vmm` are the machine; `scenarios` and
`restarts` say what is right, `outcome` and `summary` show it, `command` makes it a program.
"""
