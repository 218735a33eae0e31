// Package snapshotter is containerd's Snapshotter over lazy roots.
//
// A lazy layer is never unpacked: asked to Prepare it (with the label containerd.io/snapshot.ref, which says
// what it will be called), the snapshotter fetches and verifies its table of contents, commits a snapshot
// and answers that it exists already, so that containerd does not fetch the layer. Any other layer
// is unpacked by containerd as usual; when it is committed, its files become objects of the store and it gets a table of
// contents too (package upper). So every chain of snapshots, lazy, ordinary or mixed, is one metadata image, and what a container gets is
// one overlayfs mount, whatever the number of layers.
//
// The overlay is mounted here; containerd gets a bind mount of it. containerd could not mount
// it itself: it takes lowerdir apart at its colons.
//
// What is kept:
//
//	snapshots/metadata.db       containerd's own records (core/snapshots/storage)
//	snapshots/ID/fs, work       the writable layer of an active snapshot
//	snapshots/ID/rootfs         where its overlay is mounted
//	snapshots/ID/root.json      what it was mounted of
//	snapshots/ID/layer.json     the layer of a committed one
//	snapshots/ID/image.json     the image whose topmost layer it is
//
// Mounts outlive the process. [Open] takes over what an earlier one left: it makes the layers of what is mounted readable
// again, and removes folders that no record names. After a reboot nothing is mounted; Mounts mounts again.
//
// # Invariants
//
// No call waits for the network while it holds a lock or a transaction. No snapshot starts from a layer that is known to
// be a lie: containerd names snapshots by the diffIDs that an image's config claims, and those can be compared with a lazy
// layer only when all of it has been read (see docs/security.md).
//
// A Snapshotter may be used by several goroutines.
package snapshotter
