package meta_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"

	"lazuli/fs/meta"
	"lazuli/fs/toc"
)

func Example() {
	hello := []byte("hello\n")
	lower := &toc.TOC{
		Entries: []toc.Entry{
			{Name: "etc", Type: toc.Directory, Mode: 0o755},
			{Name: "etc/motd", Type: toc.Regular, Mode: 0o644, Size: int64(len(hello)), NumChunks: 1},
			{Name: "etc/issue", Type: toc.Symlink, Link: "motd"},
		},
		Chunks: []toc.Chunk{{Digest: sha256.Sum256(hello), Size: int64(len(hello))}},
	}
	upper := &toc.TOC{Entries: []toc.Entry{{Name: "etc/.wh.issue", Type: toc.Regular}}}

	tree, err := meta.Merge([]*toc.TOC{lower, upper})
	if err != nil {
		fmt.Println(err)
		return
	}
	var image bytes.Buffer
	if _, err := tree.WriteTo(&image); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(tree.Stats().Entries, "names in", image.Len(), "bytes")
	for o := range tree.Objects() {
		fmt.Println(lower.Entries[o.Entry].Name, "of layer", o.Layer)
	}
	// Output:
	// 2 names in 12288 bytes
	// etc/motd of layer 0
}
