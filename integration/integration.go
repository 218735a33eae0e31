// Package integration is what Lazuli is tested with from outside: a real registry that counts, real images, real
// kernel mounts, and other runtimes to be compared with.
//
//   - [Snapshot] and [Compare] say in what two directory trees differ, in everything that stat,
//     readdir, readlink, getxattr and read can tell.
//   - [NewRegistry] is a registry on this machine, with a log of what it was asked for and what it sent.
//   - Package worst writes an image that uses all that layers can express; the program in debian builds a real one.
//   - The program in peers, a module of its own, is containerd's unpacker and stargz-snapshotter's converter and file system.
//
// Tests that need root, FUSE or a kernel feature skip elsewhere and say what is missing.
package integration
