package worst

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/gzip"
)

// A layout is an OCI image layout that gets its layers one by one.
type layout struct {
	dir              string
	layers           []descriptor
	diffIDs, history []any
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    map[string]string `json:"platform,omitempty"`
}

func newLayout(dir string) (*layout, error) {
	if list, err := os.ReadDir(dir); err == nil && len(list) > 0 {
		return nil, fmt.Errorf("%s is not empty", dir)
	}
	return &layout{dir: dir}, os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755)
}

// layer writes the layer that fill makes.
func (l *layout) layer(name string, fill func(*layer)) (err error) {
	f, err := os.CreateTemp(l.dir, "layer")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	blob, diff := sha256.New(), sha256.New()
	buf := bufio.NewWriterSize(io.MultiWriter(f, blob), 1<<20)
	zip, err := gzip.NewWriterLevel(buf, gzip.BestSpeed)
	if err != nil {
		return err
	}
	plain := bufio.NewWriterSize(io.MultiWriter(zip, diff), 1<<20)
	out := &layer{w: plain, tar: tar.NewWriter(plain)}
	fill(out)
	if err := errors.Join(out.err, out.tar.Close(), plain.Flush(), zip.Close(), buf.Flush(), f.Chmod(0o644)); err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	digest := hex.EncodeToString(blob.Sum(nil))
	l.layers = append(l.layers, descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", Digest: "sha256:" + digest, Size: size})
	l.diffIDs = append(l.diffIDs, "sha256:"+hex.EncodeToString(diff.Sum(nil)))
	l.history = append(l.history, map[string]any{"created": created, "created_by": name})
	return os.Rename(f.Name(), filepath.Join(l.dir, "blobs", "sha256", digest))
}

const created = "2024-02-29T12:00:00Z"

// close writes the config, the manifest and the index.
func (l *layout) close() error {
	// A step without a layer, as ENV makes it: history is longer than the list of layers.
	l.history = append(l.history, map[string]any{"created": created, "created_by": "ENV", "empty_layer": true})
	config, err := l.blob("application/vnd.oci.image.config.v1+json", map[string]any{
		"created": created, "architecture": "amd64", "os": "linux",
		"config": map[string]any{"Env": []string{"PATH=/bin", "EMPTY=", "LINE=a\nb"}, "Cmd": []string{"/types/file"},
			"WorkingDir": "/", "Labels": map[string]string{"worst": "yes"}, "StopSignal": "SIGINT"},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": l.diffIDs},
		"history": l.history,
	})
	if err != nil {
		return err
	}
	manifest, err := l.blob("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": config, "layers": l.layers, "annotations": map[string]string{"org.opencontainers.image.title": "worst"},
	})
	if err != nil {
		return err
	}
	manifest.Platform = map[string]string{"architecture": "amd64", "os": "linux"}
	manifest.Annotations = map[string]string{"org.opencontainers.image.ref.name": "latest"}
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []any{manifest}})
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(l.dir, "index.json"), index, 0o644),
		os.WriteFile(filepath.Join(l.dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644))
}

func (l *layout) blob(mediaType string, v any) (descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, err
	}
	sum := sha256.Sum256(b)
	name := hex.EncodeToString(sum[:])
	return descriptor{MediaType: mediaType, Digest: "sha256:" + name, Size: int64(len(b))},
		os.WriteFile(filepath.Join(l.dir, "blobs", "sha256", name), b, 0o644)
}
