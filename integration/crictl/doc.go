// Package crictl is empty: its module says with which crictl Lazuli is tested, version and sums.
//
//	go build -C integration/crictl -o DIR/ tool
//
// builds it. It is the kubelet's side of the CRI, from a shell. Not one module with containerd, whose newer Kubernetes modules it does not
// know. The tests in integration build it when they need it, once for each go.sum.
package crictl
