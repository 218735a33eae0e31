package snapshotter

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"lazuli/fs/rootfs"
)

// A layer is what a committed snapshot adds to its parent. It is written down as a record with one layer, so that what
// looks for what is in use need not know of snapshots.
type layer struct {
	rootfs.Record
	// Verified says that the diffID is what the layer's tar has: containerd unpacked it, or the whole blob was compared.
	Verified bool `json:"verified,omitempty"`
	// Bad says why nothing may start from the layer. "" if nothing is known against it.
	Bad string `json:"bad,omitempty"`
}

const (
	layerFile = "layer.json"
	rootFile  = "root.json"
	// serverFile has the device number of the object server that a root was mounted on.
	serverFile = "server"
)

func (l *layer) record() rootfs.RecordLayer { return l.Layers[0] }

// dir is where the files of the snapshot with a number of containerd's storage lie.
func (s *Snapshotter) dir(id string, elem ...string) string {
	return filepath.Join(append([]string{s.root, id}, elem...)...)
}

func (s *Snapshotter) readLayer(id string) (*layer, error) {
	path := s.dir(id, layerFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	l := new(layer)
	if err := json.Unmarshal(b, l); err != nil || len(l.Layers) != 1 {
		return nil, fmt.Errorf("%s is damaged: remove the image and pull it again (%v)", path, err)
	}
	return l, nil
}

// writeLayer writes the layer down in the snapshot's folder, which is there: one that was removed must not come back.
func (s *Snapshotter) writeLayer(id string, l *layer) error {
	b, err := json.MarshalIndent(l, "", "\t")
	if err != nil {
		return err
	}
	return writeFile(s.dir(id, layerFile), b)
}

// writeFile makes a file that is there whole or not at all.
func writeFile(path string, b []byte) error {
	temp := path + ".new"
	if err := os.WriteFile(temp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// layers returns the layers of a chain of committed snapshots, the lowest first; ids come from containerd's storage, the
// highest first.
func (s *Snapshotter) layers(ids []string) ([]rootfs.RecordLayer, error) {
	list := make([]rootfs.RecordLayer, len(ids))
	for i, id := range ids {
		l, err := s.readLayer(id)
		if err != nil {
			return nil, err
		}
		if l.Bad != "" {
			return nil, &BadError{Layer: l.record().Digest, Why: l.Bad}
		}
		list[len(ids)-1-i] = l.record()
	}
	return list, nil
}

// A BadError says that a snapshot must not be used, because one of its layers is not what its image claims.
type BadError struct{ Layer, Why string }

func (e *BadError) Error() string {
	return fmt.Sprintf("the image lies about its layer %s: %s: remove it, and ask who pushed it", e.Layer, e.Why)
}
