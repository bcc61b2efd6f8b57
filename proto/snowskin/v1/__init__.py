"""The wire, package `snowskin.v1`: generated from the .proto files beside this one."""
