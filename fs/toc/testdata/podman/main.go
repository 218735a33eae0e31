// Command main made layer.tar.zst and annotations.json with containers/storage
// v1.59.1, whose code podman and buildah write zstd:chunked layers with. It is built in a module of its own,
// so that this one needs none of that:
//
//	go mod init podman && go get github.com/containers/storage@v1.59.1
//	go run . <sample.tar >layer.tar.zst 2>annotations.json
//
// where sample.tar is what makeTar(t, sample()) returns in parse_test.go.
package main

import (
	"encoding/json"
	"io"
	"log"
	"os"

	"github.com/containers/storage/pkg/chunked/compressor"
)

func main() {
	annotations := make(map[string]string)
	level := 3
	w, err := compressor.ZstdCompressor(os.Stdout, annotations, &level)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := io.Copy(w, os.Stdin); err != nil {
		log.Fatal(err)
	}
	if err := w.Close(); err != nil {
		log.Fatal(err)
	}
	json.NewEncoder(os.Stderr).Encode(annotations)
}
