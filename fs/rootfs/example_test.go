package rootfs_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
)

// An image is mounted before its files are here; reading one brings it.
func ExampleNode_Mount() {
	ctx := context.Background()
	node, err := rootfs.Open("/var/lib/lazuli", rootfs.Options{})
	if err != nil {
		panic(err)
	}
	defer node.Close()
	ref, err := remote.ParseReference("localhost:5000/python:lazy")
	if err != nil {
		panic(err)
	}
	root, err := node.Mount(ctx, ref, "", rootfs.MountOptions{})
	if err != nil {
		panic(err)
	}
	defer root.Close()
	b, err := os.ReadFile(filepath.Join(root.Dir, "etc/os-release"))
	fmt.Println(len(b), err)
}
