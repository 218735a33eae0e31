// Package containerd is empty: its module says which containerd Lazuli is tested with, version and sums.
//
//	go build -C integration/containerd -o DIR/ tool
//
// builds the daemon, ctr and the shim for runc. They are a module of their own since none of what they need shall have a say in which versions
// Lazuli itself is built with. The tests in integration build them when they need them, once for each go.sum.
package containerd
