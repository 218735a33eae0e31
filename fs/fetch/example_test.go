package fetch_test

import (
	"context"
	"fmt"
	"io"

	"lazuli/fs/fetch"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A queue brings objects of the layers that it was given into a store, when they are read.
func Example() {
	read := func(objects *store.Store, table *toc.Table, blob fetch.Blob, key store.Key) error {
		q := fetch.New(objects, fetch.Options{})
		defer q.Close()
		if err := q.Add(&fetch.Layer{Name: "layer sha256:…", Table: table, Blob: blob}); err != nil {
			return err
		}
		id, size, ok := q.Lookup(key)
		if !ok {
			return fmt.Errorf("no layer has object %v", key)
		}
		o, err := q.Open(id)
		if err != nil {
			return err
		}
		defer o.Close()
		b := make([]byte, size)
		if _, err := o.ReadAt(context.Background(), b, 0); err != nil && err != io.EOF {
			return err
		}
		fmt.Printf("%d verified bytes", len(b))
		return nil
	}
	fmt.Println(read != nil)
	// Output: true
}
