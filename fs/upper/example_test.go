package upper_test

import (
	"context"
	"fmt"

	"lazuli/fs/store"
	"lazuli/fs/toc"
	"lazuli/fs/upper"
)

// What a container wrote becomes the layer above those that it was made from.
func ExampleScan_TOC() {
	objects, err := store.Open("/var/lib/lazuli/store", nil)
	if err != nil {
		panic(err)
	}
	defer objects.Close()
	var below *toc.Table // of the layer below
	scan := &upper.Scan{
		Upper: "/var/lib/lazuli/snapshots/7/fs",
		Lower: "/var/lib/lazuli/chains/CHAIN",
		Chunks: func(key toc.Digest) ([]toc.Chunk, bool) {
			o, ok := below.Find(key)
			if !ok {
				return nil, false
			}
			chunks := make([]toc.Chunk, o.NumChunks())
			for i := range chunks {
				chunks[i], _ = o.Chunk(i)
			}
			return chunks, true
		},
		Store: objects,
		Move:  true, // the container is gone, and its upper directory goes too
	}
	layer, err := scan.TOC(context.Background())
	if err != nil {
		panic(err)
	}
	fmt.Println(layer.Digest, len(layer.Entries))
}
