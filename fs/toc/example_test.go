package toc_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"log"

	"github.com/containerd/stargz-snapshotter/estargz"

	"lazuli/fs/toc"
)

// The layer is made by stargz's library; where the blob is a slice here it is a
// registry's elsewhere.
func Example() {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	w.WriteHeader(&tar.Header{Name: "hello", Size: 5})
	io.WriteString(w, "hello")
	w.Close()
	built, err := estargz.Build(io.NewSectionReader(bytes.NewReader(layer.Bytes()), 0, int64(layer.Len())))
	if err != nil {
		log.Fatal(err)
	}
	defer built.Close()
	blob, err := io.ReadAll(built)
	if err != nil {
		log.Fatal(err)
	}
	annotations := map[string]string{toc.DigestAnnotation: built.TOCDigest().String()}

	promise, err := toc.Promised(annotations)
	if err != nil {
		log.Fatal(err) // not lazy, and why
	}
	loc, known, err := toc.Locate(annotations, int64(len(blob)))
	if err == nil && !known {
		loc, err = toc.ParseFooter(blob[len(blob)-toc.FooterSize:], int64(len(blob)))
	}
	if err != nil {
		log.Fatal(err)
	}
	t, err := toc.Parse(bytes.NewReader(blob[loc.Offset:]), loc, promise)
	if err != nil {
		log.Fatal(err)
	}
	for i := range t.Entries {
		e := &t.Entries[i]
		fmt.Println(e.Name, e.Size)
		for _, c := range t.Content(e) {
			fmt.Println(c.Digest)
		}
	}
	// Output:
	// hello 5
	// sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824
}
